"""Parameter groups: their options, the checks they meet, and the static factor of a step."""
