"""One running instance below a root directory: accounts, layout, supervision."""
