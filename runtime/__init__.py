"""What any script needs: whole files, the command line, signals, processes, provenance."""
