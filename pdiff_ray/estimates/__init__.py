"""What work will take: measured on earlier runs, or counted. Imports the stages it foretells."""
