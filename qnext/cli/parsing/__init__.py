"""How a command line is read: the command of a verb, its help, completion, flags from a file, records of flags."""
