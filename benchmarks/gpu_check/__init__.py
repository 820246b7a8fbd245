"""Everything that a GPU should be asked, in one command."""
