"""Many runs that ask one question."""
