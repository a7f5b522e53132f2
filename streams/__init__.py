"""What flows, and the pure rules about it: no Faust, network, disk or clock."""
