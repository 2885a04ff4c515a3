"""The daemon: one process that holds a node's state, serves a mount and answers the control socket."""
