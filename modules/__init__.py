"""LUM's building blocks as plain nn.Modules and functions: no files, no logging, no process groups."""

if __name__ != "lumrec.modules":
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package 'lumrec.modules': write "
        "`from lumrec.modules import ...` (a second copy of each class would exist otherwise)"
    )
