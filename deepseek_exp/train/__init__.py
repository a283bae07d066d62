"""What a training consists of: model, data, optimizer, Lightning module and callbacks."""
