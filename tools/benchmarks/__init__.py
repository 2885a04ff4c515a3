"""What ``tools/bench`` measures, a module a subcommand."""
