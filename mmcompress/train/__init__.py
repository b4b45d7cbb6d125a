"""Training of what a method learns: losses, and a script per method, `python -m mmcompress.train.<method>`."""
