"""A timm model tuned on images, in a folder from which an interrupted run goes on with the same bits."""
