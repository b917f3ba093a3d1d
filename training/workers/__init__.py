"""The three kinds of Ray actors; none knows on which device or machine it runs."""
