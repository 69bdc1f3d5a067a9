"""The demo's command: names regions of photos and videos, and draws them."""
