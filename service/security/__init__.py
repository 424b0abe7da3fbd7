"""Who may call: API keys, rates, hosts, origins, proxies, headers."""
