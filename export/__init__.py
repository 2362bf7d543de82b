"""From trained networks to verified bundles; `export.pipeline` is the line, `export.cli` the command."""
