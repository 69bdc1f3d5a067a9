"""The web page. It needs the extra ``web``: gradio and gradio_image_annotation."""
