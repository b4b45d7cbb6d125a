"""One file per method; the file's name is the registry's name. Nothing is listed here: the registry reads the folder."""
