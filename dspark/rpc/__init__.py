"""gRPC plumbing that every service shares: servers, channels, errors, leases, the draft link."""
