"""Hand-over: artifacts written as other engines read them, each with a proof that it says the same."""
