"""What storage touches beside its drivers: the data socket."""
