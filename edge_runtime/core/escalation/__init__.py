"""Keep the answer of the edge or ask the cloud, with the reason; the breaker; score fusion."""
