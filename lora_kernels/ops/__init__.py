"""What a layer computes, one file an op: schema, fake, Function, public function, in this order."""
