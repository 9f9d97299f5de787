"""What the nodes of FL-WB do."""
