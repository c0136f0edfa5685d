"""Pure rules of storage: names, kinds, revisions, reasons. No I/O, no clocks."""
