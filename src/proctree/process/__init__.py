"""What the operating system knows of processes: descriptors, identity, prctl, snapshots."""
