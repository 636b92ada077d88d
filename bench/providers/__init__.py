"""Who is compared, and a provider's call."""
