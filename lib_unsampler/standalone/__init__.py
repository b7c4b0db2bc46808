"""Without a WebUI: embedded models with exact answers, and the command line over them."""
