"""Students trained against their teacher."""
