"""Parts of the configuration: where it comes from, YAML with positions, mistakes with theirs."""
