"""Task definitions that know no simulator."""
