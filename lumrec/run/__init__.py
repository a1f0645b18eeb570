"""What every run needs, whatever its stage: run folder, files, config reader, errors, logs, processes."""
