// All that is compiled once for each instruction set, in order.

#include "vectors.inl"

#include "products.inl"
#include "quantised.inl"
#include "rows.inl"
#include "routing.inl"

#include "attention.inl"
#include "step.inl"
