"""Access control: API keys, rate limits, Host and Origin headers, trusted proxies, security headers."""
