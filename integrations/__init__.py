"""Where the packages meet outside projects: Transformers, and the command line."""
