"""Entry points: the command `lumrec`, the main of the apps, torchrun, TorchX, the check of the installation."""
