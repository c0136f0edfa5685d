"""One outside thing each: rules files, enforce workers, the resolve worker."""
