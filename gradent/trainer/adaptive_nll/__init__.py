"""DPO with a likelihood term on chosen that is as large as the account of the steps asks for."""
