"""An experiment as a list of runs, and their records. Imports torch only when something is trained."""
