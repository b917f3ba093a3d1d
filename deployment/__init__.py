"""Acting on the arm: driver, twin, executor, supervisor."""
