"""The `cwdm` command, one file per subcommand; installed as `cwdm.cli`."""
