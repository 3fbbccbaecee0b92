"""Names of other libraries over this package's own: what code that was written for them imports first."""
