"""The command line: one module per subcommand, which parses, calls the library and prints."""
