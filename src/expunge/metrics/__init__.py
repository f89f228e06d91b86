"""How far an unlearned model is from a retrained one: pure functions of stored outputs."""
