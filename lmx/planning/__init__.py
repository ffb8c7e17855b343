"""Plans: what a run would take on devices that are not here, from the compiler that would be used there."""
