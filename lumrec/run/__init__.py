"""What every run needs and no stage owns: folder, files, config reader, errors, logs, processes."""
