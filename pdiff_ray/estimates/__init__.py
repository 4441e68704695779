"""What work will take: as long as earlier runs, or by its FLOPs. Imports the stages it foretells."""
