"""The linear layers that the network is made of."""
