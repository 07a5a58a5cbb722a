"""The ground floor: small things that several rooms need and may not borrow from one another. Knows torch only."""
