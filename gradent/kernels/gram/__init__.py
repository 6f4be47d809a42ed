"""The Gram form: products of tokens, `Σ_{t,s} (u_t·x_s)(v_t·y_s)`."""
