"""One module per subcommand of `flashloom`; each exports a click command or group and is listed in flashloom.cli."""
