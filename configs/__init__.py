"""Complete presets, one TOML file each; installed as `cwdm.configs`."""
