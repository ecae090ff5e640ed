"""The command line: the command `detr`, its subcommands, and running them as jobs on clusters."""
